"""The host's side of a guest's network: taps and the scripts that connect them."""
