"""Devices: data sheets, presets, cluster files, and what this host has."""
