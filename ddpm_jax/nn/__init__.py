"""Networks, as Flax modules: batches [B, *event] in and out."""
