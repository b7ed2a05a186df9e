"""How work is laid out on the machine: one plan, in this process or in several."""
