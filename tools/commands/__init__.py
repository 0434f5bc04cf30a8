"""Names, arguments and help texts of the commands, a module for each kind; the work is done elsewhere in `kvdb.tools`."""
