"""Learning: the LoRA policy, packed log-probs, RLOO and its checkpoints."""
