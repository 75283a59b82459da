"""What student and teacher say about every sampled token, and the credit that follows."""
