"""The judge: what selection and codecs cost in quality, per byte, on real KV of a real model (`kvdb eval`)."""
