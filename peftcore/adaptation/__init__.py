"""The one mechanism: a module's class is swapped for one whose forward runs adapters, and threads call it safely."""
