"""Question 2, representativeness: what distilled data keeps of real training."""
