"""Parts of techniques, each of which anyone may call; none is a technique."""
