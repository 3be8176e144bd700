"""The reference world of real pictures: 154 objects by four artists, and a model that was trained on them."""
