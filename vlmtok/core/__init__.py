"""The contract: what a method sees and answers, what a pass carries, what ran."""
