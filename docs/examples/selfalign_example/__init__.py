"""A loss, a judge and a pair rule for selfalign."""
