"""A credential that no message, log or file may show."""

SECRET = "planted-SECRET/key+0815"
