<?php
$CONFIG = array (
  'datadirectory' => '/home/user-data/owncloud',
  'instanceid' => 'sample',
  'trusted_domains' => array (0 => 'mail.example.com'),
  'dbtype' => 'sqlite3',
);
