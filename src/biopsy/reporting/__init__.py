"""Reports of runs and studies, as one HTML file.

``document`` defines the parts of a report as plain records, ``elements`` the parts that several sections
share; ``html`` renders a `ReportDocument` with the templates in ``templates``. ``facts`` are the input of a
report, ``registry`` finds the sections, ``compose`` assembles the report of a run, ``checklist`` links it to
two reporting guidelines, and ``pseudonyms`` replaces ids before anything is written.
"""
