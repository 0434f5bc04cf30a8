"""`kvdb report` and `kvdb plot`: a store on one page, and each of its pictures alone. What is shown is computed in `kvdb`."""
