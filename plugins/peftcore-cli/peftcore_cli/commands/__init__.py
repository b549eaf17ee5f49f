"""Commands of the core, one file each. Code that commands share is in the parent folder."""
