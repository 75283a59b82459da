"""Trajectories: engines that sample, tools that run, the loop between them, their controller."""
