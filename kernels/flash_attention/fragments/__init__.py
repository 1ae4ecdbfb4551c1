"""What a tile in the registers of tensor cores goes through: masks, dropout, stores."""
