"""Question 3, pointwise information: what one distilled image means."""
