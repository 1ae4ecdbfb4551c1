"""What a tile of scores in the registers of tensor cores goes through: masks and dropout."""
