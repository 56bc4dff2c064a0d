"""How an answer is cut out of a response and compared with the reference: used by effreason.grades, free of JAX."""
