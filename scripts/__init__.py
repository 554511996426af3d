"""Commands for people who change this repository; nothing imports them."""
