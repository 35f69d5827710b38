"""The viewer (`view`) and the REST service (`serve`), both over HTTP.

`web` holds what both share (limits, refusals, the server), `scenes` what can be looked at, `viewer` the
page's addresses, `annotations` what reviewers say, `service` the REST interface, `jobs` and `batching` its
work.
"""
