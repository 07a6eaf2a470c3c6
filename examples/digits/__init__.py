"""A small network with BatchNorm and dropout, trained on scikit-learn's handwritten digits."""
