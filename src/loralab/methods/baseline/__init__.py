"""What every study compares with."""
