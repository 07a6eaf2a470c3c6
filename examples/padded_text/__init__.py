"""A language model on texts of different lengths: padding, and weights that leave it out."""
