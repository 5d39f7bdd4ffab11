"""The processes of one run, and the collective operations between them."""
