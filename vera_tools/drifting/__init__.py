"""What builds really draw: the `probe` (a script of its own), `environments`, the `effect` on an adapter.

`drift` puts them together, `comparison` sets reports side by side, `page` is the HTML report.
"""
