"""What a result looks like: plots, and pages that hold them."""
