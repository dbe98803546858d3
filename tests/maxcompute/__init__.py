"""A MaxCompute of our own on 127.0.0.1, that the real pyodps talks to.

It speaks REST (XML and JSON), jobs that make tables, and the tunnel's sessions up and down, records
and Arrow, and is as strict as the service: requests without a valid signature are refused, and so
is what the service would refuse. `fault` makes it fail on demand.

    server     requests: who may, what is asked for, the answer
    store      projects, tables, partitions, sessions
    ddl        statements that make tables and partitions
    wire       the tunnel's two formats of rows
    signature  whether a request is signed by the right key
    fault      what goes wrong, and when
"""
