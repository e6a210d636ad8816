"""What techniques are made of: each file a part that anyone may call, none of them a technique."""
