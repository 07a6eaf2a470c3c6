"""An image classifier with BatchNorm, trained on PNG files in a Parquet column."""
