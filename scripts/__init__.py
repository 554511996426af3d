"""Commands for people who change this repository: they make its assets, record results and measure its structure."""
