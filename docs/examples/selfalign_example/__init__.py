"""A loss, a judge, a pair rule and a data schema for selfalign."""
