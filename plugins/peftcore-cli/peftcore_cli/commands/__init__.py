"""Commands of the core, one file each; code shared by several is one folder up."""
