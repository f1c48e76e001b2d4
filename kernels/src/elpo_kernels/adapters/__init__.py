"""The losses in the places that other trainers have for them."""
