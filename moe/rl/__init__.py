"""Reinforcement learning with verifiable rewards, after Step 3.5 Flash (arXiv 2602.10604, section 5.2): MIS-PO."""
