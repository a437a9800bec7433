"""Code for one backend only; imported where it is used."""
