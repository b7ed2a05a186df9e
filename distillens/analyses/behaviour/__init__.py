"""Question 1, behaviour: whether distilled data can stand in for real data."""
