"""What real torch builds draw: the atlas, and the streams that its entries hold."""
