"""The `kvdb` command and everything offline. Imports `kvdb` and `kvdb.runtime`; nothing imports it."""
