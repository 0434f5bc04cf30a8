"""The judge: what selection costs in quality, per byte, on real KV of a real model (`kvdb eval`)."""
