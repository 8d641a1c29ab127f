"""Networks as Flax modules; the first axis of their inputs and outputs is the batch."""
