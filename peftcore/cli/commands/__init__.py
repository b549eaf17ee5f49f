"""The commands of the core, one file each; what several of them use lies a folder higher."""
