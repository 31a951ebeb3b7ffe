"""What vera_A and vera_B are, bit for bit, in numpy alone: no file is opened here."""
