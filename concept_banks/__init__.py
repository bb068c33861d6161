"""Shipped banks and the recipes they were made from: data only."""
