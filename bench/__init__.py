"""The bench: what MISS does beside other archives on the same machine, in one run, as one table.

    python -m bench --help

Everything is made here: the load, the servers' fresh data, the certificates. Imports every package, and no
package imports it.
"""
