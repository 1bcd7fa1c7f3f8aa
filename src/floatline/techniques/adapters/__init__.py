"""The parts of LoRA: which layers get adapters, and how adapters are saved, loaded and merged."""
