"""What the commands of `infalign` do that need no model: a question asked, a table answered."""
