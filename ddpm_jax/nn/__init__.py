"""Networks, written as Flax modules; inputs and outputs are batches [B, *event]."""
