"""Reports: what a run or a study found, as one HTML file.

``document`` holds the parts of a report as plain records, ``elements`` what several sections share, ``html``
renders a `ReportDocument` with the templates in ``templates``. ``facts`` are the records that a report is
written from, ``registry`` finds the sections, ``compose`` puts the report of a run together, ``checklist``
links it to two reporting guidelines, and ``pseudonyms`` replaces ids before anything is written.
"""
