"""Flash-Decoding: few queries against many keys, which are split over the whole GPU."""
