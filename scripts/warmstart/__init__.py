"""The tiny policy's beginnings: its words, its model, its demonstrations and the gate it must pass."""
